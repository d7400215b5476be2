"""A loss of what a network sees in images, beside that of their pixels."""
