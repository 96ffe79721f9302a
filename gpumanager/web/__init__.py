"""The HTTP face: routes, the error boundary, and the guard that gives the GPU back."""
