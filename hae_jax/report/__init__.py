"""The report page: one HTML file about a folder of results or a training run, made from the files on disk."""
