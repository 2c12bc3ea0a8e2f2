package main

import (
	"context"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/ipc/proto"
)

// completeKeys completes key names by asking the daemon. It never makes the shell wait for more than a second.
func (a *app) completeKeys(c *cobra.Command, args []string, begun string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	parent := c.Context()
	if parent == nil {
		parent = context.Background()
	}
	ctx, cancel := context.WithTimeout(parent, time.Second)
	defer cancel()
	// A listing wants a whole namespace, so what is typed goes along only once the namespace is complete.
	prefix := ""
	if strings.Contains(begun, "/") {
		prefix = begun
	}
	var page proto.KeyListReply
	if err := a.call(ctx, proto.OpKeyList, &proto.KeyList{Prefix: prefix}, &page); err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []cobra.Completion
	for _, k := range page.Keys {
		if strings.HasPrefix(k.Name, begun) {
			names = append(names, cobra.CompletionWithDesc(k.Name, k.Algorithm))
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// onKey makes c a command that takes the name of a key.
func (a *app) onKey(c *cobra.Command) *cobra.Command {
	c.Args = exactArgs("NAME")
	c.ValidArgsFunction = a.completeKeys
	return c
}

// keyFlag registers --key with completion.
func (a *app) keyFlag(c *cobra.Command, key *string, usage string) {
	c.Flags().StringVar(key, "key", "", usage)
	c.MarkFlagRequired("key")
	a.completeFlag(c, "key")
}

// completeFlag completes key names after a flag.
func (a *app) completeFlag(c *cobra.Command, flag string) {
	c.RegisterFlagCompletionFunc(flag, func(c *cobra.Command, _ []string, begun string) ([]cobra.Completion, cobra.ShellCompDirective) {
		return a.completeKeys(c, nil, begun)
	})
}
