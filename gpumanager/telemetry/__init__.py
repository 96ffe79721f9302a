"""What happened, declared as events; metrics, traces and logs are made from them."""
