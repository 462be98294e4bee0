"""Takes a finished run out of rmoe: graphs for other programs, and dense models made of mixtures."""
