"""How the bundled reader came about: its stories, its exam, its training and its export. Not in the wheel."""
