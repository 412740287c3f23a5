"""The kernels between the products: attention, the delta rule, the router, the end of a product."""
