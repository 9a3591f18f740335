"""The loops of the ranks: leader and follower, the mail and the log between them."""
