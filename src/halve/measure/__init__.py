"""Records and what fills them: quality and speed of a model folder, however it was made."""
