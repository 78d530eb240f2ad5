"""From a file of questions and a folder of images to a file of answers, and from that to a benchmark's own numbers."""
