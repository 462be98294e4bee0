"""Data: the embedded data set (`scenes`), and checks of data sets on disk (`check`)."""
