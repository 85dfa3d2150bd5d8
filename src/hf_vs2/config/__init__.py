"""What artefacts say of themselves: the configs of SAEs and steered CLIPs, edits of latents, and the checks they
share."""
