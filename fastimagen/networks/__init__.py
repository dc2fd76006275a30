"""U-Nets and their parts."""
