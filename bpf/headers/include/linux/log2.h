/* Named by bcc; nothing of it is used. See linux/kconfig.h. */
