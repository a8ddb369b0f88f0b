"""A data set looked at before it is trained on: every image, token count and label mask."""
