"""Files on disk -> arrays in the packed tile layout. Users import `jaxwna16` instead."""
