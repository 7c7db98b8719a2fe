"""The report page: one HTML file of a folder of results or of a training run, from what lies on disk there."""
