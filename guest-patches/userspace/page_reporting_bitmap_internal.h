/* SPDX-License-Identifier: GPL-2.0 */
/* Stands in for the file of this name in mm/: all that the core sees of a kernel. */
#include "kernel.h"
