"""What test modules share: no test module imports another one.

- `fixtures.py`: the fixtures of all folders, registered by `tests/conftest.py`.
- `programs.py`, `forking_server.py`, `forked.py`: programs that start from a process which has imported torch already.
- `jobs.py`: whole jobs, as a user starts them.
"""
