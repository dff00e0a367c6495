"""What the gateway tells of itself: metrics cells, their exposition, the access log."""
