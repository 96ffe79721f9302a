"""One job's life: its place in the queue, its hold on the GPU, its call to the consumer, and what
becomes of it when nobody wants it any more. Knows no WSGI; `web` turns requests into jobs."""
