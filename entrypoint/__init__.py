"""From the environment to a running trainer."""
