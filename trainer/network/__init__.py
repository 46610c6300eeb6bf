"""The one client for everything that speaks HTTP, and the bounds that it puts on what a server does.

Read `client` (how it is opened, redirects, proxies, errors), `bounds` (time and bytes, down to the socket), `addresses`
(what can be an address at all) and `errors`. Imports `trainer.spec`.
"""
