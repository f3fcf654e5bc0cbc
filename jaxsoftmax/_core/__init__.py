"""What every chapter stands on: argument checks, dtypes, sums over the class axis, centring, scalar functions."""
