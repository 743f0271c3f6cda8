// Kernel module: switches AMX's state on. Bochs 3.0 has no XFD, without which Linux leaves it off.
//
// Nobody saves the tiles when the kernel changes tasks: good for one program that uses them.
#include <linux/module.h>

static int __init tiles_on(void) {
  u32 low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  asm volatile("xsetbv" : : "a"(low | 3u << 17), "d"(high), "c"(0));
  return 0;
}

module_init(tiles_on);
MODULE_DESCRIPTION("Switches the AMX state on");
MODULE_LICENSE("GPL");
