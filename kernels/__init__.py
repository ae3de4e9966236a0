"""Pure compute: functions of tensors, without collectives and without imports from the rest of the package."""
