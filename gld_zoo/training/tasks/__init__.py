"""What is trained: a classifier, a detector, a segmenter; each brings data, loss and scores."""
