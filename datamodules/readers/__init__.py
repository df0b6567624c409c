"""One file per data set layout on disk; each turns it into facts and samples."""
