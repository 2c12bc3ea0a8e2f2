//go:build cgo

package token

import "context"

// gate lets a number of calls in at once, or one alone. Waiting ends with the context.
type gate struct {
	places chan struct{} // holds one token for each place that is taken
	alone  chan struct{} // holds one token while somebody collects all places
}

func newGate(n int) gate {
	return gate{places: make(chan struct{}, n), alone: make(chan struct{}, 1)}
}

func (g gate) enter(ctx context.Context) error { return take(ctx, g.places) }

func (g gate) leave() { <-g.places }

func (g gate) enterAlone(ctx context.Context) error {
	if err := take(ctx, g.alone); err != nil {
		return err
	}
	for n := range cap(g.places) {
		if err := take(ctx, g.places); err != nil {
			for range n {
				<-g.places
			}
			<-g.alone
			return err
		}
	}
	return nil
}

func (g gate) leaveAlone() {
	for range cap(g.places) {
		<-g.places
	}
	<-g.alone
}

func take(ctx context.Context, c chan struct{}) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case c <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
