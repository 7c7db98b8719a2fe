"""Processing of folders of cases into folders of results."""
