"""Image stores and the cache of base images."""
