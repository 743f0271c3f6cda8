// The first and only program of the emulated machine: runs the tests of one row, then switches off.
//
// The kernel hands it row=NAME and mode=MODE of its command line as environment variables.
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

int main(void) {
  const int module = open("/tiles.ko", O_RDONLY);
  if (module >= 0 && syscall(SYS_finit_module, module, "", 0) != 0) perror("tiles.ko");
  const pid_t child = fork();
  if (child == 0) {
    execl("/tests", "tests", "row", getenv("row"), getenv("mode"), (char*)NULL);
    _exit(127);
  }
  int status = -1;
  waitpid(child, &status, 0);
  printf("status %d\n", status);
  fflush(stdout);
  sleep(1);  // the serial port is slow
  return reboot(RB_POWER_OFF);
}
