/* SPDX-License-Identifier: GPL-2.0 */
/* Replaces the file of this name in mm/: the core's view of the kernel. */
#include "kernel.h"
