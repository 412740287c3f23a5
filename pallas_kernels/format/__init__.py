"""What a packed weight is; `spec` and `weights` say it, all else follows."""
