"""A small world with real video files, so that everything runs anywhere."""
