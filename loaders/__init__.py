"""Files on disk -> arrays in the packed tile layout, through `open`. Users import `jaxwna16`."""
