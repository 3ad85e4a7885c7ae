"""What frameworks need beyond the pool itself, in one module for each framework.

The package never imports these modules: an application imports the one that it needs.
"""
