"""The token path: authenticate, route, forward bytes, account. No disk, no database, no torch."""
