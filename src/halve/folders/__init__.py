"""Output folders: the one place where OUT is claimed, resumed and published, and where it is said what may be replaced."""
