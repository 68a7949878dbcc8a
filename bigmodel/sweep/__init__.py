"""`bigmodel sweep`: a ladder of small runs, a scaling law fitted to them, and the loss that it predicts."""
