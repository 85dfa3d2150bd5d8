"""Rows of CLIPs, extracted once and kept: the store on disk, and rows wherever they come from."""
