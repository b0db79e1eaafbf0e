"""What a fit leaves behind: the partition, the masks, tables and files. Reading them takes no Lightning."""
