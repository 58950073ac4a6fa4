"""rar: retrieve-and-rank visual recognition (arXiv 2403.13805) as a distributed batch job."""

__version__ = "0.1.0"
