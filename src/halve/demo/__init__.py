"""The bundled reader: its generated English, its exam and the script that trained it."""
