"""Bytes on sockets: HTTP/1.1 exchanges with arrival stamps, and server-sent events taken apart afterwards."""
