"""repconv: fuse the branches of re-parameterizable networks into single convolutions, proven equal."""
