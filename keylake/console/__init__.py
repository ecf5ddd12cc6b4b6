"""`keylake console`: the running cluster as a picture in the browser, seen and handled with one role at a time."""
