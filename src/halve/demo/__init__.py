"""The bundled reader: `halve demo` compresses a small trained model in several ways, examines and times each."""
