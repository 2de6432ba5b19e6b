"""What measures the rest: experiments for the claims, and a bench against well-known peers."""
