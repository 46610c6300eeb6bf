"""From the environment to a running trainer."""

# Here because three readers share it: the settings, the supervisor, which must find the folder although the settings
# are wrong, and the health check, which imports no libraries.
DEFAULT_OUTPUT_PATH = "/workspace/output"
DEFAULT_CACHE_PATH = "/workspace/cache"
