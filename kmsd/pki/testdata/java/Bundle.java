import java.io.InputStream;
import java.nio.file.*;
import java.security.cert.*;
import java.util.*;
import org.bouncycastle.cert.jcajce.JcaCertStore;
import org.bouncycastle.cms.*;

/**
 * Writes certificates as PKCS#7 with BouncyCastle, in the way and the text form of MOSIP's interfaces: base64url of BER with
 * indefinite lengths. Arguments: a PEM file. The result is on standard output.
 */
public class Bundle {
    public static void main(String[] args) throws Exception {
        List<X509Certificate> list = new ArrayList<>();
        try (InputStream f = Files.newInputStream(Path.of(args[0]))) {
            for (java.security.cert.Certificate c : CertificateFactory.getInstance("X.509").generateCertificates(f)) {
                list.add((X509Certificate) c);
            }
        }
        CMSSignedDataGenerator generator = new CMSSignedDataGenerator();
        generator.addCertificates(new JcaCertStore(list));
        byte[] made = generator.generate(new CMSProcessableByteArray(new byte[0])).getEncoded();
        System.out.print(Base64.getUrlEncoder().encodeToString(made));
    }
}
