package android.graphics;

public final class Paint {
    public static final int FILTER_BITMAP_FLAG = 2;
    final int flags;

    public Paint(int flags) { this.flags = flags; }
}
