"""What features are about: explanations read, searched, and written where there are none."""
