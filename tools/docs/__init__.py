"""Parts of the pages made from what they describe: tables from records, the map from the rooms, help from the command."""
