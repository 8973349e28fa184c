"""Text and pictures: the scenes data set, CLIP, and what draws pictures from captions."""
